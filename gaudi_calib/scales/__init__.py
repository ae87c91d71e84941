"""Scales from ranges: the methods of INC and the op rules that apply them."""
