"""Writing the merged model."""
