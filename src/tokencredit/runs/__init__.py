"""Training runs from a config: one run (`train`), and runs side by side (`compare`).

The walk of `tokencredit train CONFIG`:

    cli/train.py            arguments, signals (stop), a progress bar; --launch starts the processes (launch)
      config/load.py        YAML and --set  →  RunConfig: typed, checked, credit and rewards parsed; read once
      train.py              train_run(config, folder):
        folders.py            is the folder free, finished, or to be resumed?
        checks.py             load model, data and rewards (data/), make TRL's GRPOConfig (config/arguments)  →  Ready
        plan.py               what is about to happen, shown to the user
        adapters/trl          CreditGRPOTrainer: TRL's loop with the credit pipeline
        callback.py           after each step: metrics, progress, signals, evaluation (evaluation, sampling)
        folders.py            the finished run: model, metrics, last checkpoint
"""
