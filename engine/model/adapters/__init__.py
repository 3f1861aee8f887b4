"""Low-rank adapters on frozen linear layers, dense or in NF4: lora.py is the layer, choose.py and files.py where it
comes from.
"""
