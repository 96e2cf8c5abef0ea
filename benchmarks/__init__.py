"""What the tables of figures in the documentation come from."""
