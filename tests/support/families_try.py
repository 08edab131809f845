import sys, os, warnings, traceback, signal, resource
warnings.simplefilter("ignore")
sys.path.insert(0, "tests")
import torch; torch.set_num_threads(1)
import transformers; transformers.logging.set_verbosity_error()
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as c, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as s
from support.families import *
def one(f, auto):
    cfg = CONFIG_MAPPING[f](**small_fields(CONFIG_MAPPING[f], f))
    torch.manual_seed(0)
    with torch.device("meta"): n = sum(p.numel() for p in auto.from_config(cfg).parameters())
    if n > 5e6: return f"LARGE {n/1e6:.0f}M"
    m = auto.from_config(cfg).eval()
    ids = torch.randint(5, 300, (2, 20))
    kw = {"decoder_input_ids": ids} if auto is AutoModelForSeq2SeqLM else {}
    with torch.no_grad(): out = m(input_ids=ids, attention_mask=torch.ones_like(ids), **kw)
    return f"ok {n/1e3:.0f}k {tuple(out.logits.shape)} layers {getattr(cfg.get_text_config(), 'num_hidden_layers', None)}"
names = [(f, AutoModelForCausalLM) for f in c] + [(f, AutoModelForSeq2SeqLM) for f in s]
if sys.argv[1:]: names = [x for x in names if x[0] in sys.argv[1:]]
for f, auto in names:
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(40); resource.setrlimit(resource.RLIMIT_DATA, (4<<30, 4<<30))
        try: r = one(f, auto)
        except BaseException as e:
            r = "ERR " + type(e).__name__ + " " + " ".join(str(e).split())[:230]
            if sys.argv[1:]: traceback.print_exc()
        print(f, "c" if auto is AutoModelForCausalLM else "s", r, flush=True); os._exit(0)
    _, st = os.waitpid(pid, 0)
    if st: print(f, "died", st, flush=True)
