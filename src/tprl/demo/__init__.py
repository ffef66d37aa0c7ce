"""A local web page: ask about a picture, and see which of its patches the answer needed."""
