"""What a quantized weight is, how it is made, stored and multiplied. Imports no comfy."""
