"""KV heads shared between query heads (GQA, MQA). `operation.py` lists the methods.

`base.py` has what all methods share. `mean`, `first` and `random` (`merge_methods.py`) need only the weights:
`grouping.py` chooses which heads share, and `merge.py` merges them. `closed_form` (`closed_form_method.py`) needs a
calibration text:

1. `closed_form.py` orders the KV heads, and chooses how many each layer keeps (`lost_alone.py`, `heads_by_layer.py`).
2. calibration/closed_form/layerwise_fit.py sends the text through the base and the converted model, layer by layer.
3. `layer.py` converts each layer to match the base's attention. It merges keys by low rank, fits queries and keys,
   merges values, fits the output projection, then values, and the output projection once more.
4. The MLP's output projection is refitted to the base's hidden states after the layer.
5. `closed_form.py` writes the new layers into the model (`architecture.edit.write_layers`), and conversion/convert.py
   saves it. These steps need the loaded engine. The other methods can also rewrite a checkpoint layer by layer on
   disk (`rewrite`).
"""
