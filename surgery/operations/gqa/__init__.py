"""KV heads shared between query heads (GQA, MQA): `operation.py` is the recipe's entry, a list of methods.

`base.py` has what all methods share. `mean`, `first` and `random` (`merge_methods.py`) need the weights alone:
`grouping.py` chooses which heads share, `merge.py` merges. `closed_form` (`closed_form_method.py`) needs a calibration
text:

1. `closed_form.py` orders the KV heads and chooses the layers that keep theirs (`choose_layers.py`);
2. `streams.py` sends the text through the base and the converted model, layer by layer;
3. `layer.py` merges the heads of one layer by low rank (`low_rank.py`), then fits queries and keys (`fit_scores.py`),
   values (`fit_values.py`) and the output projection to what the base's attention gave (`layer_inputs.py`);
4. `fit_mlp.py` refits the MLP's output projection to the base's hidden states after the layer.

`conjugate_gradient.py` solves the least squares of step 3; `cost.py` estimates time and memory for a plan.
"""
