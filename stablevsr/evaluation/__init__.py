"""How near a result is to the truth: metrics, and reports of them."""
