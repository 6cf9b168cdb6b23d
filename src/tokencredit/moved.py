"""Modules that have moved: their old names still import, with a warning, until version 0.2."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "tokencredit."

# Old name to new name, below the package.
MOVED = {
    "records": "batch.records",
    "masked": "batch.masked",
    "reduce": "batch.reduce",
    "tiles": "batch.row_ranges",
    "store": "batch.store",
    "loading": "pipeline.plugins",
    "steps": "pipeline.steps",
    "credit": "pipeline",
    "labels": "pipeline.labels",
    "evaluate": "diagnostics.success_rates",
    "methods.rules": "methods.probability",
    "methods.adapter": "methods.adapter_residual",
    "methods.self_distillation": "methods.distillation",
    "methods.distillation_table": "methods.table",
    "methods.quadrants": "methods.entropy.quadrants",
    "methods.rhythm": "methods.attention.rhythm",
    "collect.adapter": "collect.adapter_residual",
    "collect.head_divergence": "collect.head.divergence",
    "collect.head_frozen": "collect.head.frozen",
    "collect.head_gemm": "collect.head.gemm",
    "collect.head_objective": "collect.head.objective",
    "collect.head_tiles": "collect.head.tiles",
    "collect.attention_fused": "collect.attention.fused",
    "collect.attention_kernels": "collect.attention.kernels",
    "collect.attention_maps": "collect.attention.rhythms",
    "collect.attention_parts": "collect.attention.parts",
    "collect.attention_rows": "collect.attention.rows",
    "collect.attention_short": "collect.attention.short",
    "collect.options": "collect.table",
    "collect.record_texts": "collect.token_texts",
    "collect.answer": "collect.attention.answer",
    "collect.exact_gradient": "collect.exact.gradient",
    "collect.exact_packing": "collect.exact.packing",
    "collect.exact_score": "collect.exact.score",
    "collect.exact_search": "collect.exact.search",
    "collect.exact_spellings": "collect.exact.spellings",
    "collect.exact_trie": "collect.exact.trie",
    "collect.monte_carlo": "collect.exact.monte_carlo",
    "collect.teacher_checks": "collect.teacher.checks",
    "collect.teacher_model": "collect.teacher.model",
    "collect.teacher_objective": "collect.teacher.objective",
    "collect.teacher_probe": "collect.teacher.probe",
    "collect.teacher_prompts": "collect.teacher.prompts",
    "collect.teacher_score": "collect.teacher.score",
    "collect.teacher_server": "collect.teacher.server",
    "collect.teacher_states": "collect.teacher.states",
    "adapters.trl_batch": "adapters.trl.batch",
    "adapters.trl_card": "adapters.trl.card",
    "adapters.trl_checks": "adapters.trl.checks",
    "adapters.trl_collectors": "collect.collectors",
    "adapters.trl_passes": "adapters.trl.passes",
    "adapters.trl_rewards": "adapters.trl.rewards",
    "adapters.trl_sampling": "adapters.trl.sampling",
    "adapters.trl_taps": "adapters.trl.taps",
    "adapters.collector_options": "collect.table",
    "adapters.texts": "collect.token_texts",
    "adapters.verl_batch": "adapters.verl.batch",
    "adapters.verl_checks": "adapters.verl.checks",
    "adapters.verl_doctor": "adapters.verl.doctor",
    "adapters.verl_loss": "adapters.verl.loss",
    "adapters.verl_rows": "adapters.verl.rows",
    "adapters.verl_settings": "adapters.verl.settings",
    "adapters.verl_signals": "adapters.verl.signals",
    "adapters.verl_trainer": "adapters.verl.trainer",
    "adapters.doctor": "doctor",
    "adapters.launchers": "doctor.launchers",
    "runs.world": "runs.processes",
    "runs.config_types": "runs.config.rewards",
    "runs.defaults": "runs.config.trainer_fields",
    "runs.results": "runs.compare.table",
    "runs.workers": "runs.compare.workers",
    "runs.arguments": "runs.config.arguments",
    "runs.datasets": "runs.data.datasets",
    "runs.prompts": "runs.data.prompts",
    "runs.rewards": "runs.data.rewards",
    "bench.world": "bench.problem",
    "bench.pipelines": "bench.entries",
    "diagnostics.bootstrap": "diagnostics.stats",
    "diagnostics.intervals": "diagnostics.stats",
    "report.html": "report.run_page.page",
    "report.runs": "report.run_page.folders",
    "report.lines": "report.run_page.lines",
    "report.trainer_folder": "report.run_page.script_folder",
    "report.figures": "report.run_page.figures",
    "report.signals": "report.run_page.signals",
    "report.distillation": "report.run_page.distillation",
    "report.tokens": "report.run_page.tokens",
    "report.results": "report.run_page.results",
    "recipes.ingest": "recipes.pool.ingest",
    "recipes.formats": "recipes.pool.formats",
    "recipes.readers": "recipes.pool.readers",
    "recipes.store": "recipes.signals.store",
    "recipes.materials": "recipes.signals.materials",
    "recipes.encode": "recipes.pool.encode",
    "recipes.answers": "recipes.pool.answers",
    "recipes.words": "recipes.pool.words",
    "recipes.forward": "recipes.signals.forward",
    "recipes.logits": "recipes.signals.logits",
    "recipes.textsignals": "recipes.signals.text",
    "recipes.relevance": "recipes.signals.relevance",
    "recipes.sae": "recipes.signals.sae",
    "recipes.minhash": "recipes.signals.minhash",
    "recipes.neardup": "recipes.signals.neardup",
    "recipes.recipe": "recipes.program.recipe",
    "recipes.operators": "recipes.program.operators",
    "recipes.selectors": "recipes.program.selectors",
    "recipes.execute": "recipes.program.execute",
    "recipes.state": "recipes.program.state",
    "recipes.sft": "recipes.evaluate.sft",
    "recipes.ngram": "recipes.evaluate.ngram",
    "recipes.commands": "recipes.evaluate.command",
    "recipes.config": "recipes.search.config",
    "recipes.history": "recipes.evaluate.history",
    "recipes.policies": "recipes.search.policies",
    "recipes.propose": "recipes.search.propose",
    "recipes.surrogate": "recipes.search.surrogate",
    "recipes.objective": "recipes.search.objective",
    "recipes.paper": "recipes.search.paper",
    "recipes.llm": "recipes.search.llm",
    "recipes.runs": "recipes.search.runs",
}


class _MovedModules(MetaPathFinder, Loader):
    """Finds an old name and gives the module of the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(PACKAGE)
        return ModuleSpec(fullname, self) if fullname.startswith(PACKAGE) and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = PACKAGE + MOVED[spec.name.removeprefix(PACKAGE)]
        warnings.warn(f"{spec.name} has moved to {new}", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back; it has run already."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the old names importable; a second call changes nothing."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
