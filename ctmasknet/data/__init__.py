"""Reading and preparing chest CT slices."""
