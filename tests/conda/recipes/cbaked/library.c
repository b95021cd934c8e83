/* The ways a prefix is found in real binaries. */
static const char file[] = PREFIX "/share/cbaked/data.txt";
static const char twice[] = PREFIX "/share/cbaked:" PREFIX "/etc/cbaked";
static const char *const table[] = {PREFIX "/lib/first", PREFIX "/lib/second", "neither"};

const char *cbaked_file(void) { return file; }
const char *cbaked_twice(void) { return twice; }
const char *cbaked_table(int index) { return table[index]; }
