"""GPS, as a method: the weights with the largest gradients are trained as they are."""
