"""Quantizers: pure pairs of functions between dense states and their stored form. They know no model and no benchmark."""
