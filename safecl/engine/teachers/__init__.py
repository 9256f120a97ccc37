"""Teachers: streamed, online, recorded, and the outputs that are kept of them."""
