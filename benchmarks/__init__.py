"""What a private step costs, next to a non-private one and to other libraries."""
