"""Networks and adapters of other tools: read where they lie, and written so that those tools run them."""
