"""Gates on heads: a mixture of heads (MoH), or a mixture of h - 1 heads (MAE). `router.py` fits the routers."""
