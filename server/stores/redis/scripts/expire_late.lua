expire_late()
