/* Without arguments: a line of the data file. With one: what is baked in, one on each line. */
#include <stdio.h>

const char *cbaked_file(void);
const char *cbaked_twice(void);
const char *cbaked_table(int index);

static const char alone[] = PREFIX;

int main(int argc, char **argv)
{
    char line[256];
    FILE *stream;

    (void)argv;
    if (argc > 1) {
        puts(alone);
        puts(cbaked_file());
        puts(cbaked_twice());
        puts(cbaked_table(1));
        /* A length that the compiler counted: replacing the prefix does not change it. */
        printf("%zu\n", sizeof alone - 1);
        return 0;
    }
    stream = fopen(cbaked_file(), "r");
    if (stream == NULL || fgets(line, sizeof line, stream) == NULL) {
        perror(cbaked_file());
        return 1;
    }
    fputs(line, stdout);
    return 0;
}
