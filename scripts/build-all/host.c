// Loads an addon as Node does, where no Node for that libc can be had: every symbol bound at once, and the
// function called by name that Node-API looks for. Not its initialisation: that needs a Node.

#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char **argv) {
  void *addon = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
  void *entry = addon ? dlsym(addon, "napi_register_module_v1") : NULL;
  if (!entry) {
    const char *reason = dlerror();
    fprintf(stderr, "%s\n", reason ? reason : "usage: host ADDON");
    return 1;
  }
  puts("loaded");
  return 0;
}
