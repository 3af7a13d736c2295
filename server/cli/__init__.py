"""One file a command; `application` is all of them."""
