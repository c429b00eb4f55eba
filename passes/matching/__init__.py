"""From a softmax to an attention, or to the reason why it is none."""
