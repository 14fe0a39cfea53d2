"""How each type of layer yields its per-unit gradients, in factored form."""
