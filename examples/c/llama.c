/*
 * Creates a llama.cpp model from a GGUF file that dmaload reads, evaluates a few tokens, and
 * prints a checksum of the logits:
 *
 *     llama [--compare] MODEL.gguf
 *
 * llama.cpp asks for the data of each tensor while dmaload is still reading the file. With
 * --compare, llama.cpp's own loader loads the file too, and the logits must be bit-identical.
 *
 *     cc llama.c -o llama $(pkg-config --cflags --libs dmaload llama)
 *
 * The model must be in one file.
 */
#define _GNU_SOURCE
#include <dmaload.h>
#include <errno.h>
#include <ggml-backend.h>
#include <gguf.h>
#include <llama.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define TOKENS 32
#define EMBEDDINGS "token_embd.weight"
#define OUTPUT "output.weight"

/* A GGUF file that is being loaded. */
struct source {
    struct dmaload_load *load;
    struct gguf_context *metadata;
    /* The id of the tensor that shares the data of EMBEDDINGS, or -1 if there is none. */
    int64_t shared_id;
    /* Address space for the whole file. Each segment is mapped at its offset in the file. */
    char *bytes;
    size_t file_bytes;
    /* The segments up to this offset in the file have been mapped. */
    size_t mapped_bytes;
    /* The first error, or an empty string. The callback cannot return an error to llama.cpp. */
    char error[1024];
};

/* Stores an error, unless an earlier one is stored already. */
__attribute__((format(printf, 2, 3))) static void fail(struct source *source, const char *format, ...)
{
    if (source->error[0])
        return;
    va_list values;
    va_start(values, format);
    vsnprintf(source->error, sizeof source->error, format, values);
    va_end(values);
}

/* Waits for the next segment and maps it. Returns 0 after the last one, and after an error. */
static int map_next_segment(struct source *source)
{
    struct dmaload_segment segment;
    int status;
    while ((status = dmaload_poll(source->load, &segment)) == DMALOAD_PENDING) {
        struct pollfd wanted = { .fd = dmaload_event_fd(source->load), .events = POLLIN };
        if (poll(&wanted, 1, -1) < 0 && errno != EINTR) {
            fail(source, "cannot wait for the load: %s", strerror(errno));
            return 0;
        }
    }
    if (status < 0)
        fail(source, "%s", dmaload_last_error());
    if (status != DMALOAD_SEGMENT)
        return 0;
    uint64_t end = segment.file_offset + segment.bytes;
    if (end > source->file_bytes)
        fail(source, "the file has grown");
    else if (mmap(source->bytes + segment.file_offset, segment.bytes, PROT_READ, MAP_SHARED | MAP_FIXED, segment.fd,
                  0) == MAP_FAILED)
        fail(source, "cannot map a segment: %s", strerror(errno));
    else
        source->mapped_bytes = end;
    close(segment.fd);
    return !source->error[0];
}

static int ends_with(const char *name, const char *end)
{
    size_t length = strlen(name), end_length = strlen(end);
    return length >= end_length && strcmp(name + length - end_length, end) == 0;
}

static int is_llama(const struct gguf_context *metadata)
{
    int64_t key = gguf_find_key(metadata, "general.architecture");
    return key >= 0 && strcmp(gguf_get_val_str(metadata, key), "llama") == 0;
}

/*
 * Sets a tensor that the file lacks. llama.cpp creates all optional tensors of the architecture,
 * with type F32 if the file lacks them. Factors are set to 1 and biases to 0, so that they have no
 * effect. Biases are set only for the architecture "llama", where all of them are optional. For
 * any other tensor, this fails.
 */
static void set_missing_tensor(struct source *source, struct ggml_tensor *tensor)
{
    const char *name = ggml_get_name(tensor);
    int is_factor = ends_with(name, ".scale") || ends_with(name, ".input_scale") || strcmp(name, "rope_freqs.weight") == 0;
    int is_bias = ends_with(name, ".bias") && is_llama(source->metadata);
    if (tensor->type != GGML_TYPE_F32 || (!is_factor && !is_bias)) {
        fail(source, "the file has no tensor \"%s\"", name);
        return;
    }
    size_t count = (size_t)ggml_nelements(tensor);
    float *values = malloc(count * sizeof *values);
    if (!values) {
        fail(source, "cannot allocate %zu values for \"%s\"", count, name);
        return;
    }
    for (size_t index = 0; index < count; index++)
        values[index] = is_factor ? 1 : 0;
    ggml_backend_tensor_set(tensor, values, 0, count * sizeof *values);
    free(values);
}

/* llama.cpp calls this for each tensor, in its own order, after it has allocated all of them. */
static void set_tensor(struct ggml_tensor *tensor, void *user)
{
    struct source *source = user;
    const struct gguf_context *metadata = source->metadata;
    const char *name = ggml_get_name(tensor);
    if (source->error[0])
        return;
    int64_t id = gguf_find_tensor(metadata, name);
    if (id < 0) {
        set_missing_tensor(source, tensor);
        return;
    }
    if (id == source->shared_id)
        id = gguf_find_tensor(metadata, EMBEDDINGS);
    /*
     * llama.cpp gives the tensor the type in the metadata, but computes the shape from the model's
     * parameters, so it can differ from the shape in the file.
     */
    size_t begin = gguf_get_data_offset(metadata) + gguf_get_tensor_offset(metadata, id);
    size_t bytes = gguf_get_tensor_size(metadata, id);
    if (memcmp(tensor->ne, gguf_get_tensor_ne(metadata, id), sizeof tensor->ne) != 0 || ggml_nbytes(tensor) != bytes) {
        fail(source, "tensor \"%s\" has a different shape in the file", name);
        return;
    }
    while (source->mapped_bytes < begin || source->mapped_bytes - begin < bytes)
        if (!map_next_segment(source)) {
            fail(source, "the file ends before the data of tensor \"%s\"", name);
            return;
        }
    ggml_backend_tensor_set(tensor, source->bytes + begin, 0, bytes);
}

/* Reads the metadata: the offset and the type of each tensor, but none of the data. */
static int read_metadata(struct source *source, FILE *file)
{
    struct ggml_context *tensors = NULL;
    struct gguf_init_params params = { .no_alloc = true, .ctx = &tensors };
    source->metadata = gguf_init_from_file_ptr(file, params);
    if (!source->metadata) {
        fail(source, "cannot read the file's GGUF metadata");
        return 0;
    }
    /*
     * In a model without output.weight, the token embeddings are also the output weights.
     * llama.cpp would create output.weight with type F32, so it is added to the metadata with the
     * type of the embeddings.
     */
    const struct ggml_tensor *embeddings = ggml_get_tensor(tensors, EMBEDDINGS);
    source->shared_id = -1;
    if (embeddings && gguf_find_tensor(source->metadata, OUTPUT) < 0) {
        struct ggml_tensor output = *embeddings;
        ggml_set_name(&output, OUTPUT);
        gguf_add_tensor(source->metadata, &output);
        source->shared_id = gguf_find_tensor(source->metadata, OUTPUT);
    }
    ggml_free(tensors);
    return 1;
}

/* Creates the model during the load. Returns NULL and sets `source->error` after an error. */
static struct llama_model *create_model(struct source *source, FILE *file)
{
    /* Small segments, so that llama.cpp gets the first tensors early. */
    struct dmaload_options options = { .size = sizeof options, .segment_bytes = 16 << 20 };
    struct stat found;
    if (fstat(fileno(file), &found) < 0) {
        fail(source, "cannot inspect the file: %s", strerror(errno));
        return NULL;
    }
    if (dmaload_start(fileno(file), &options, &source->load) < 0) {
        fail(source, "%s", dmaload_last_error());
        return NULL;
    }
    if (!read_metadata(source, file))
        return NULL;
    source->file_bytes = (size_t)found.st_size;
    source->bytes = mmap(NULL, source->file_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (source->bytes == MAP_FAILED) {
        source->bytes = NULL;
        fail(source, "cannot reserve address space: %s", strerror(errno));
        return NULL;
    }
    struct llama_model *model =
        llama_model_init_from_user(source->metadata, set_tensor, source, llama_model_default_params());
    if (!model)
        fail(source, "llama.cpp cannot create the model");
    /* Only after the load has ended is it certain that the file did not change, so wait for it. */
    while (!source->error[0] && map_next_segment(source))
        ;
    if (source->error[0] && model) {
        llama_model_free(model);
        model = NULL;
    }
    return model;
}

/* Loads the model. If that fails, prints the error and returns NULL. */
static struct llama_model *load_with_dmaload(const char *path)
{
    struct source source = { 0 };
    struct dmaload_report report = { .size = sizeof report };
    struct llama_model *model = NULL;
    FILE *file = fopen(path, "re");
    if (file) {
        model = create_model(&source, file);
        fclose(file);
    } else {
        fail(&source, "%s", strerror(errno));
    }
    if (model && dmaload_load_report(source.load, &report) == 0)
        printf("dmaload: %llu bytes in %llu segments\n", (unsigned long long)report.bytes,
               (unsigned long long)report.segments);
    if (!model)
        fprintf(stderr, "cannot load %s: %s\n", path, source.error);
    dmaload_free(source.load);
    gguf_free(source.metadata);
    if (source.bytes)
        munmap(source.bytes, source.file_bytes);
    return model;
}

/*
 * Evaluates the first tokens of the vocabulary, and frees the model. Returns the logits after the
 * last token, which the caller has to free, and stores their number in `count`. Returns NULL after
 * an error.
 */
static float *evaluate(struct llama_model *model, size_t *count)
{
    struct llama_context_params params = llama_context_default_params();
    int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token tokens[TOKENS];
    int32_t token_count = vocabulary < TOKENS ? vocabulary : TOKENS;
    float *logits = NULL;
    params.n_ctx = TOKENS;
    struct llama_context *context = llama_init_from_model(model, params);
    for (int32_t token = 0; token < token_count; token++)
        tokens[token] = token;
    if (context && llama_decode(context, llama_batch_get_one(tokens, token_count)) == 0) {
        const float *last = llama_get_logits_ith(context, -1);
        *count = (size_t)vocabulary;
        logits = last ? malloc(*count * sizeof *logits) : NULL;
        if (logits)
            memcpy(logits, last, *count * sizeof *logits);
    }
    if (!logits)
        fprintf(stderr, "cannot evaluate the model\n");
    llama_free(context);
    llama_model_free(model);
    return logits;
}

static void print_checksum(const char *loader, const float *logits, size_t count)
{
    const unsigned char *bytes = (const unsigned char *)logits;
    uint64_t checksum = 0xcbf29ce484222325;
    for (size_t index = 0; index < count * sizeof *logits; index++)
        checksum = (checksum ^ bytes[index]) * 0x100000001b3;
    printf("%s: %zu logits, from %g to %g, checksum %016llx\n", loader, count, logits[0], logits[count - 1],
           (unsigned long long)checksum);
}

/* Receives llama.cpp's log messages, and prints only the errors. */
static void log_message(enum ggml_log_level level, const char *text, void *user)
{
    (void)user;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

int main(int argc, char **argv)
{
    int compare = argc == 3 && strcmp(argv[1], "--compare") == 0;
    if (argc != 2 + compare) {
        fprintf(stderr, "usage: %s [--compare] MODEL.gguf\n", argv[0]);
        return 2;
    }
    const char *path = argv[argc - 1];
    size_t count = 0, expected_count = 0;
    float *logits = NULL, *expected = NULL;
    int status = 1;

    llama_log_set(log_message, NULL);
    ggml_backend_load_all();
    llama_backend_init();

    struct llama_model *model = load_with_dmaload(path);
    logits = model ? evaluate(model, &count) : NULL;
    if (logits) {
        print_checksum("dmaload", logits, count);
        status = 0;
    }
    if (logits && compare) {
        struct llama_model_params params = llama_model_default_params();
        /*
         * With extra buffer types, llama.cpp rearranges weights, and results are rounded
         * differently. llama_model_init_from_user uses none of these types, so they are turned off
         * for the comparison.
         */
        params.use_extra_bufts = false;
        model = llama_model_load_from_file(path, params);
        expected = model ? evaluate(model, &expected_count) : NULL;
        if (expected)
            print_checksum("llama.cpp", expected, expected_count);
        if (!expected || count != expected_count || memcmp(logits, expected, count * sizeof *logits) != 0) {
            fprintf(stderr, "%s\n", expected ? "the logits differ" : "llama.cpp cannot load the model");
            status = 1;
        } else {
            printf("the logits are equal\n");
        }
    }
    free(expected);
    free(logits);
    llama_backend_free();
    return status;
}
