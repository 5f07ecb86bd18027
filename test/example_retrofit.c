#define RETROFIT_IMPLEMENTATION
#include "../retrofit.h"
