// The generation loop in C on the library's API and nothing else: what any program in another language is held against.
//
//     bare_loop MODEL N_PROMPT N_TOKENS RUNS THREADS [TEMP]
//
// Draws (top-k 40, top-p 0.95, min-p 0.05, temperature, seed 1; TEMP 0: the likeliest), asks for the end of
// generation (and goes on behind it), writes the piece into a buffer, decodes. One line a run: tokens per second.

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec * 1e-9;
}

static void silent(enum ggml_log_level level, const char * text, void * data) {
    (void) level, (void) text, (void) data;
}

static struct llama_sampler * chain_of(float temp) {
    struct llama_sampler * chain = llama_sampler_chain_init(llama_sampler_chain_default_params());
    if (temp <= 0) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return chain;
    }
    llama_sampler_chain_add(chain, llama_sampler_init_top_k(40));
    llama_sampler_chain_add(chain, llama_sampler_init_top_p(0.95f, 0));
    llama_sampler_chain_add(chain, llama_sampler_init_min_p(0.05f, 0));
    llama_sampler_chain_add(chain, llama_sampler_init_temp_ext(temp, 0, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(1));
    return chain;
}

int main(int argc, char ** argv) {
    if (argc < 6) {
        return 2;
    }
    const int n_prompt = atoi(argv[2]), n_tokens = atoi(argv[3]), runs = atoi(argv[4]);
    const float temp = argc > 6 ? (float) atof(argv[6]) : 0.8f;
    llama_log_set(silent, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 1;
    }
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = n_prompt + n_tokens + 8;
    params.n_threads = params.n_threads_batch = atoi(argv[5]);
    struct llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 1;
    }
    const struct llama_vocab * vocab = llama_model_get_vocab(model);
    llama_token * prompt = malloc(sizeof(llama_token) * n_prompt);
    for (int i = 0; i < n_prompt; i++) {
        prompt[i] = 100 + i * 7 % 200;
    }
    char * text = malloc(64 + 256 * (size_t) n_tokens);
    for (int run = 0; run < runs; run++) {
        llama_memory_clear(llama_get_memory(context), false);
        struct llama_sampler * chain = chain_of(temp);
        for (int at = 0; at < n_prompt; at += 512) {
            const int count = n_prompt - at < 512 ? n_prompt - at : 512;
            if (llama_decode(context, llama_batch_get_one(prompt + at, count))) {
                return 1;
            }
        }
        llama_synchronize(context);
        size_t length = 0;
        int ends = 0;
        const double started = now();
        for (int i = 0; i < n_tokens; i++) {
            llama_token token = llama_sampler_sample(chain, context, -1);
            ends += llama_vocab_is_eog(vocab, token);
            const int size = llama_token_to_piece(vocab, token, text + length, 256, 0, false);
            length += size > 0 ? size : 0;
            if (llama_decode(context, llama_batch_get_one(&token, 1))) {
                return 1;
            }
        }
        llama_synchronize(context);
        printf("%.3f %zu %d\n", n_tokens / (now() - started), length, ends);
        llama_sampler_free(chain);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}
