/* Stands between CPython's getpath.o and Py_DecodeLocale: where the one asks for the other with the
   prefix that Debian built it for, the answer is the prefix it is to have. */
#include <string.h>
#include <wchar.h>

wchar_t *Py_DecodeLocale(const char *, size_t *);

wchar_t *prefix_DecodeLocale(const char *text, size_t *length)
{
    return Py_DecodeLocale(strcmp(text, "/usr") == 0 ? PREFIX : text, length);
}
