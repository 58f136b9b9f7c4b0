"""What finished runs say: rows, tables, pictures and one page."""
