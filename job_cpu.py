import json, os, sys, time, statistics
mode=sys.argv[1]; formats=sys.argv[2].split(","); OUT=os.environ["OUT_JOB"]
here=os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.environ["COMFYUI_PATH"]); sys.path.append(here+"/pack"); sys.path.append(here+"/path")
sys.argv=["main.py","--cpu","--base-directory","/tmp/textbase"]+([] if 0 else ["--disable-dynamic-vram"])
import torch
import comfy.options; comfy.options.enable_args_parsing()
import comfy_aimdo.control
from comfy.cli_args import enables_dynamic_vram
if enables_dynamic_vram(): comfy_aimdo.control.init()
import comfy.memory_management, comfy.model_management as mm, comfy.model_patcher
if enables_dynamic_vram() and mm.is_nvidia():
    if comfy_aimdo.control.init_devices(((d.index,0) for d in mm.get_all_torch_devices())):
        comfy.model_patcher.CoreModelPatcher=comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled=True
        print("dynamic vram on", flush=True)
import comfy.sd, logging
logging.basicConfig(level=logging.INFO); logging.getLogger().addFilter(lambda r: "clip missing" not in str(r.msg) and "Missing weight" not in str(r.msg))
from comfy.text_encoders.llama import BaseGenerate
from lowbit.ops.quantize import quantize_weight, core_config, core_config_tensor
from lowbit.ops import quantize as Q
from lowbit.ops.formats import find_format, storage_for
from lowbit.host.weights.output_head import attach_output_head, output_head_tensors
from lowbit.host.weights.loading import take_over
from lowbit.host.text import route
from lowbit.host.text.generating import TextGeneration, generate_text
from lowbit.text.caches import CachePolicy
import inspect
SHAPES={"qwen25":dict(h=256,ff=512,L=2,q=512,kv=512,V=152064,bias=True,qn=False,head=True),
        "qwen3":dict(h=4096,ff=12288,L=36,q=4096,kv=1024,V=151936,bias=False,qn=True,head=True)}
def make(name, fmt):
    c=SHAPES[name]; made={}
    torch.manual_seed(0)
    def lin(n,k,q=True,gain=1.0):
        key=(n,k,q,gain)
        if key not in made:
            w=torch.randn(n,k,device="cpu",dtype=torch.bfloat16)/k**.5*gain
            if fmt!="none" and q:
                f=find_format(fmt); parts=quantize_weight(w,storage_for(f,k))
                parts={k2:v.cpu() for k2,v in parts.items()}
            else: parts={"weight":w.cpu()}
            made[key]=parts
        return made[key]
    sd={}
    def put(p,parts):
        for k2,v in parts.items(): sd[f"{p}.{k2}"]=v
    sd["model.embed_tokens.weight"]=torch.randn(c["V"],c["h"],device="cpu",dtype=torch.bfloat16).cpu()
    one=lambda n:(torch.ones(n)).bfloat16()
    for i in range(c["L"]):
        p=f"model.layers.{i}"
        put(p+".self_attn.q_proj",lin(c["q"],c["h"])); put(p+".self_attn.k_proj",lin(c["kv"],c["h"])); put(p+".self_attn.v_proj",lin(c["kv"],c["h"]))
        if c["bias"]:
            for x,n in (("q",c["q"]),("k",c["kv"]),("v",c["kv"])): sd[f"{p}.self_attn.{x}_proj.bias"]=torch.randn(n).bfloat16()*.02
        if c["qn"]:
            sd[p+".self_attn.q_norm.weight"]=one(128); sd[p+".self_attn.k_norm.weight"]=one(128)
        put(p+".self_attn.o_proj",lin(c["h"],c["q"])); put(p+".mlp.gate_proj",lin(c["ff"],c["h"])); put(p+".mlp.up_proj",lin(c["ff"],c["h"],gain=1.01)); put(p+".mlp.down_proj",lin(c["h"],c["ff"]))
        sd[p+".input_layernorm.weight"]=one(c["h"]); sd[p+".post_attention_layernorm.weight"]=one(c["h"])
    sd["model.norm.weight"]=one(c["h"])
    hk="lm_head" if name=="qwen25" else "model.lm_head"
    put(hk,lin(c["V"],c["h"]))
    return sd
def load(name,fmt,pack=True):
    t=time.time(); sd=make(name,fmt); heads=[output_head_tensors(sd)]
    clip=comfy.sd.load_text_encoder_state_dicts([sd],clip_type=comfy.sd.CLIPType.QWEN_IMAGE if name=="qwen25" else comfy.sd.CLIPType.FLUX2, model_options={"qwen25_7b_model_config":dict(hidden_size=256,intermediate_size=512,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=4)})
    for m in clip.cond_stage_model.modules():
        if hasattr(m,"visual"): m.visual=torch.nn.Identity()
    clip.patcher.size=0
    if name=="qwen25": print("head",attach_output_head(clip,heads))
    print("adopted",take_over(clip.cond_stage_model),"load s",round(time.time()-t,1),flush=True)
    for m in clip.cond_stage_model.modules():
        if isinstance(m,BaseGenerate):
            m.model.config.stop_tokens=[-5]; owner=m; 
    import lowbit.host.text.generating as G
    G.STOP_TOKENS.clear()
    return clip,owner
def toks(clip,owner,n):
    g=torch.Generator().manual_seed(3)
    ids=torch.randint(100,150000,(n//50,),generator=g).tolist()
    key=clip.cond_stage_model.clip_name
    return {key:[[(i,1.0) for i in ids]]}
def timed(f):
    None; t=time.time(); r=f(); None; return r,time.time()-t
R={}
def save():
    json.dump(R,open(f"{OUT}/{mode}-{'-'.join(formats)}.json","w"),indent=1)
def rate(clip,tokens,n,**kw):
    clip.generate(tokens,do_sample=False,max_length=12,**kw)
    first=statistics.median(timed(lambda:clip.generate(tokens,do_sample=False,max_length=1,**kw))[1] for _ in range(3))
    None
    out,t=timed(lambda:clip.generate(tokens,do_sample=False,max_length=n,**kw))
    return out,dict(first_s=round(first,4),tok_s=round((n-1)/(t-first),1),with_all=round(n/t,1),peak_mib=round(0/2**20))
def profile(clip,tokens,tag):
    from torch.profiler import profile as P, ProfilerActivity as A
    with P(activities=[A.CUDA]) as p: clip.generate(tokens,do_sample=False,max_length=40)
    rows=sorted(p.key_averages(),key=lambda e:-e.self_device_time_total)[:28]
    print("PROFILE",tag)
    for e in rows: print(f"{e.self_device_time_total/1e3:9.2f} ms {e.count:6d} x {e.self_device_time_total/max(1,e.count):8.2f} us  {e.key[:90]}")
    sys.stdout.flush()
@torch.inference_mode()
def main():
    for fmt in formats:
        try:
            clip,owner=load("qwen25",fmt); tokens=toks(clip,owner,1000)
            row=R[fmt]={}
            owner.logits=lambda x: owner.model.lm_head(x[:,-1:])
            core,row["core"]=rate(clip,tokens,24); print(fmt,mode,"core",row["core"],flush=True); save()
            ours=route.install(clip,TextGeneration())
            got,row["graph"]=rate(ours,tokens,40); print(fmt,mode,"graph",row["graph"],"same first tokens as core",sum(a==b for a,b in zip(core,got)),"of",len(core),flush=True); save()
            eager=route.install(clip,TextGeneration(cuda_graph=False))
            got2,row["eager"]=rate(eager,tokens,40); print(fmt,mode,"eager",row["eager"],"equal graph",got2==got[:40],flush=True)
            hh=route.install(clip,TextGeneration(cache=CachePolicy("heavy_hitters",252,252)))
            _,row["heavy"]=rate(hh,tokens,40); print(fmt,mode,"heavy",row["heavy"],flush=True); save()
            s=dict(temperature=.7,top_k=64,top_p=.95,min_p=.05,repetition_penalty=1.05,seed=7)
            a=ours.generate(tokens,do_sample=True,max_length=40,**s); b=eager.generate(tokens,do_sample=True,max_length=40,**s); c=clip.generate(tokens,do_sample=True,max_length=24,**s)
            a2=ours.generate(tokens,do_sample=True,max_length=40,**s)
            print(fmt,"sampled: graph==eager",a==b,"repeat",a==a2,"same as core",sum(x==y for x,y in zip(a,c)),flush=True)
            _,t=timed(lambda:ours.generate(tokens,do_sample=True,max_length=20,**s)); print("sampling tok/s incl all",200/t,flush=True)
            if 0: profile(ours,tokens,fmt)
        except Exception as e:
            import traceback; traceback.print_exc(); sys.stderr.flush()
        mm.unload_all_models(); clip=ours=eager=hh=owner=None
        import gc; gc.collect(); torch.cuda.empty_cache()
    if 0 and "int8" in formats:
        try:
            clip,owner=load("qwen3","int8"); hh=route.install(clip,TextGeneration(cache=CachePolicy("heavy_hitters",252,252)))
            for n in (1000,16000,31000):
                tokens=toks(clip,owner,n)
                _,row=rate(hh,tokens,200); R[f"qwen3-hh-{n}"]=row; print("qwen3 hh",n,row,flush=True); save()
            full=route.install(clip,TextGeneration())
            for n in (1000,16000):
                tokens=toks(clip,owner,n); _,row=rate(full,tokens,200); R[f"qwen3-full-{n}"]=row; print("qwen3 full",n,row,flush=True); save()
        except Exception as e:
            import traceback; traceback.print_exc()
main()
