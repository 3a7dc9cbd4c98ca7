"""Several processes for one run: who they are, what they say to each other, and how the model is shared among them."""
