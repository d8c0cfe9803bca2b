"""Gates on heads: a mixture of heads (MoH), or of all heads but one (MAE); `router.py` fits the routers."""
