"""The store of many processes: Redis or Valkey, one primary."""
