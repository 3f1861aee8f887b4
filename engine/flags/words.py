"""Other trainers' words for what a flag of ours may be, and their names with dots."""

from __future__ import annotations

from engine.flags.foreign import No

DTYPES_OF_OTHERS = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"} | {
    name: No("it needs loss scaling, which bfloat16 and float32 do not") for name in ("fp16", "half", "float16")
}
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "torch.optim.AdamW", "AdamW"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "paged_adamw_8bit", "bitsandbytes.optim.PagedAdamW8bit"), "adamw_8bit"),
    "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw",
}
SCHEDULES = {
    "constant_with_warmup": "constant",
    "wsd": "warmup_stable_decay",
    "cosine_with_restarts": No("restarts are not built; with one cycle, the default, it is cosine"),
    "polynomial": No("it is not built; of power 1, the default, it is linear but for an end of 1e-7"),
    "reduce_lr_on_plateau": No("a schedule is a function of the step alone here"),
    "greedy": No("a schedule is a function of the step alone here"),
    "cosine_warmup_with_min_lr": No("it is not built; cosine_with_min_lr begins its warm-up at 0"),
}
KERNELS = {
    **dict.fromkeys(("flash_attention_2", "flash_2", "kernels-community/flash-attn2"), "flash2"),
    **dict.fromkeys(("flash_attention_3", "flash_3", "kernels-community/flash-attn3"), "flash3"),
    "kernels-community/flash-attn": "flash2",
    "kernels-community/vllm-flash-attn3": "flash3",
    "flash_attention_4": "flash4",
    "flex_attention": No("it is not built; packed attention is flash-attention's, torch's varlen or sdpa"),
}
RECOMPUTED = {"true": "full", "false": "none"}
KL = {"kl1": "k1", "kl2": "k2", "kl3": "k3", "0": "k1", "1": "k2", "2": "k3"} | {
    "3": No("it is not built; k1, k2 and k3 are")
}
ESTIMATORS = {  # of advantages
    "group_norm": "grpo",
    **dict.fromkeys(("reinforce", "reinforce_plus_plus"), "reinforce_pp"),
    "gae": No("it needs a value model: that is launch.ppo"),
    **dict.fromkeys(
        ("reinforce_baseline", "reinforce_plus_plus_baseline"),
        No("a group's mean with the batch's deviation is not built: grpo, dr_grpo, rloo and reinforce_pp are"),
    ),
}
SCALES = {  # TRL's scale_rewards
    **dict.fromkeys(("group", "true"), "advantage=grpo"),
    **dict.fromkeys(("none", "false"), "advantage=dr_grpo"),
    "batch": No("the batch's deviation is not built: group (--advantage grpo) and none (dr_grpo) are"),
}
LOSSES = {  # TRL's loss_type
    **dict.fromkeys(("dapo", "bnpo"), "aggregate=token"),
    "grpo": "aggregate=sequence",
    "dr_grpo": "aggregate=dr_grpo",
    "cispo": "surrogate=cispo aggregate=token",
    **dict.fromkeys(("sapo", "luspo", "vespo"), No("it is not built; dapo, grpo, dr_grpo, bnpo and cispo are")),
}
MEANS = {  # verl's loss_agg_mode
    "token-mean": "token",
    "seq-mean-token-mean": "sequence",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": No("it is not built; token-mean, seq-mean-token-mean and seq-mean-token-sum-norm are"),
}
KL_LOSSES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3", "abs": No("it is not built; k2, k3 and unbiased are")}
REPORTS = {"all": No("say which: none, tensorboard or wandb")}

# torchtune's, verl's and OpenRLHF's words with dots → ours; they are answered, not taken
DOTTED = {
    "optimizer.lr": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer._component_": "optimizer",
    "lr_scheduler._component_": "lr_scheduler_type",
    "lr_scheduler.num_warmup_steps": "warmup_steps",
    "tokenizer.max_seq_len": "max_seq_length",
    "tokenizer.path": "model_name_or_path",
    "checkpointer.checkpoint_dir": "model_name_or_path",
    "checkpointer.output_dir": "output_dir",
    "dataset._component_": "dataset_name",
    "dataset.source": "dataset_name",
    "dataset.split": "dataset_split",
    "loss.beta": "beta",
    "loss.label_smoothing": "label_smoothing",
    "loss._component_": "loss_type",
    "model.lora_rank": "lora_rank",
    "model.lora_alpha": "lora_alpha",
    "model.lora_attn_modules": "lora_target_modules",
    "model.model_name_or_path": "model_name_or_path",
    "model.beta": "beta",
    "model.path": "model_name_or_path",
    "actor_rollout_ref.model.path": "model_name_or_path",
    "actor_rollout_ref.model.enable_gradient_checkpointing": "gradient_checkpointing",
    "actor_rollout_ref.model.lora_rank": "lora_rank",
    "actor_rollout_ref.actor.optim.lr": "learning_rate",
    "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "warmup_ratio",
    "actor_rollout_ref.actor.optim.weight_decay": "weight_decay",
    "actor_rollout_ref.actor.ppo_epochs": "num_ppo_epochs",
    "actor_rollout_ref.actor.clip_ratio": "cliprange clip_low",  # the first that a command has
    "actor_rollout_ref.actor.clip_ratio_low": "clip_low",
    "actor_rollout_ref.actor.clip_ratio_high": "clip_high",
    "actor_rollout_ref.actor.clip_ratio_c": "dual_clip",
    "actor_rollout_ref.actor.loss_agg_mode": "aggregate",
    "actor_rollout_ref.actor.policy_loss.loss_mode": "surrogate",
    "actor_rollout_ref.actor.entropy_coeff": "entropy_coef",
    "actor_rollout_ref.actor.use_kl_loss": "kl_in",
    "actor_rollout_ref.actor.kl_loss_coef": "kl_coef",
    "actor_rollout_ref.actor.kl_loss_type": "kl_estimator",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": "tis_cap",
    "actor_rollout_ref.rollout.n": "num_samples_per_prompt",
    "actor_rollout_ref.rollout.temperature": "temperature",
    "actor_rollout_ref.rollout.top_p": "top_p",
    "critic.model.path": "value_model_name_or_path",
    "critic.optim.lr": "value_learning_rate",
    "critic.cliprange_value": "cliprange_value",
    "algorithm.adv_estimator": "advantage",
    "algorithm.norm_adv_by_std_in_grpo": "advantage",
    "algorithm.use_kl_in_reward": "kl_in",
    "algorithm.filter_groups.max_num_gen_batches": "dynamic_sampling",
    "algorithm.gamma": "gamma",
    "algorithm.lam": "lam",
    "algorithm.kl_ctrl.kl_coef": "kl_coef",
    "data.train_files": "dataset_name",
    "data.val_files": "eval_dataset_name",
    "data.train_batch_size": "batch_size",
    "data.max_length": "max_seq_length",
    "data.max_response_length": "response_length",
    "data.micro_batch_size_per_gpu": "per_device_train_batch_size",
    "optim.lr": "learning_rate",
    "optim.lr_warmup_steps_ratio": "warmup_ratio",
    "optim.clip_grad": "max_grad_norm",
    "trainer.total_epochs": "num_train_epochs",
    "trainer.total_training_steps": "max_steps",
    "trainer.save_freq": "save_steps",
    "trainer.test_freq": "eval_steps",
    "trainer.default_local_dir": "output_dir",
    "trainer.critic_warmup": "value_warmup_steps",
    "adam.lr": "learning_rate",
    "train.batch_size": "batch_size",
    "train.micro_batch_size": "per_device_train_batch_size",
    "train.max_epochs": "num_train_epochs",
    "data.dataset": "dataset_name",
    "data.max_len": "max_seq_length",
    "algo.kl.init_coef": "kl_coef",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lam",
    "actor.eps_clip": "cliprange clip_low",
    "actor.clip_ratio": "cliprange clip_low",
    "actor.clip_ratio_low": "clip_low",
    "actor.clip_ratio_high": "clip_high",
    "actor.loss_agg_mode": "aggregate",
    "reward_model.overlong_buffer.len": "overlong_buffer",
    "reward_model.overlong_buffer.penalty_factor": "overlong_penalty",
}
