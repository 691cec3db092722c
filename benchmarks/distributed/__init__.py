"""What synchronised statistics cost: counted, timed, and computed for more processes than there are here."""
