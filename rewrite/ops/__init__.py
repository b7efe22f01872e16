"""What is known of an operator, whatever pass asks."""
