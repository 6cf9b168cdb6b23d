"""What the credit did: concentration, quadrants, position, agreement, and the intervals around them."""
