"""The programs a person runs; nothing imports them."""
