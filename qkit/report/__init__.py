"""What was decided, as pictures and as pages that need nothing beside them."""
