"""How many workers an arrival rate needs: the server's own batching, costs and admission on a virtual clock."""
