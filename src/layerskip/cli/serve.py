"""The verb serve: a model over HTTP, in the shape of OpenAI's."""

from __future__ import annotations

from layerskip.cli.app import Loading, Model, load, verb
from layerskip.cli.show.terminal import note
from layerskip.errors import UserError
from layerskip.serve.settings import KEY, ServeOptions, read_key


@verb
def serve(model: Model, settings: ServeOptions, loading: Loading) -> None:
    """Serve a model to clients of OpenAI's interface, and a page to look at how it decodes.

    layerskip serve smollm2-135m --port 8000
    """
    key = read_key(settings.api_key_file)
    try:
        from layerskip.serve.app import create_app
        from layerskip.serve.metrics import Metrics
        from layerskip.serve.run import log_to, run
        from layerskip.serve.service import Service
    except ImportError as error:
        raise UserError(f"{error.name} is missing", "pip install 'layerskip[serve]'") from error
    if not settings.is_local and key is None:
        note(
            f"anybody who reaches {settings.host} may use this server: set {KEY}, or --api-key-file", "yellow"
        )
    lm = load(model, loading)
    name = settings.name or model
    metrics = Metrics(name)
    service = Service(lm, settings, name, metrics)
    app = create_app(service, metrics, key)
    told = service.settings
    note(f"{told.rows} rows of {told.context} tokens, a queue of {told.queue}")
    note(f"http://{told.host}:{told.port}  (Ctrl-C finishes what runs and leaves)")
    log_to()
    service.start()
    try:
        run(app, service)
    except (OSError, SystemExit) as error:
        raise UserError(
            f"cannot listen on {told.host}:{told.port}", "choose another --port, or stop who has it"
        ) from error
