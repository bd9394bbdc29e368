"""What was decided, as images and as pages that need nothing beside them."""
