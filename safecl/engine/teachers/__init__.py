"""Teachers: streamed, online and recorded, and their stored outputs."""
