"""KV heads shared between query heads (GQA, MQA): `operation.py` is the recipe's entry, a list of methods.

`base.py` has what all methods share. `mean`, `first` and `random` (`merge_methods.py`) need the weights alone:
`grouping.py` chooses which heads share, `merge.py` merges. `closed_form` (`closed_form_method.py`) needs a calibration
text:

1. `closed_form.py` orders the KV heads and chooses the layers that keep theirs (`choose_layers.py`);
2. `layerwise_fit.py` sends the text through the base and the converted model, layer by layer;
3. `layer.py`, of each layer, against what the base's attention gave (`layer_inputs.py`): merges keys by low rank
   (`low_rank.py`), fits queries and keys (`fit_scores.py`), merges values, fits the output projection, then values
   (`fit_values.py`), and the output projection once more;
4. `fit_mlp.py` refits the MLP's output projection to the base's hidden states after the layer;
5. `closed_form.py` writes the new layers into the model (`architecture.edit.write_layers`); conversion/convert.py
   saves it. The loaded engine runs all this: `rewrite`, layer by layer on disk, is of the other methods.

`conjugate_gradient.py` solves the least squares of step 3; `cost.py` estimates time and memory for a plan.
"""
