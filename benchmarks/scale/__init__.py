"""How the private step scales: measured on this machine, fitted, and held against more runs."""
