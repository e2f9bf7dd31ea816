// operator new and delete for objects that one thread makes and another one destroys.
//
// MLX builds a graph on one thread, some dozen small objects a node, and a worker thread destroys
// them. In glibc a freed block goes back to the arena that it came from, so that both threads wait
// for the same lock, asleep: a third of the time of a small model's step.
//
// Here a freed block goes into a list of the thread that frees it, from there, in chains, into one
// for all, and from that, all at once, to a thread that has none left. Lists are by size. Every
// block is one of malloc's and may be given to free, and any block of malloc's may be deleted here:
// nothing breaks if only some of a process's libraries call these functions.

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <initializer_list>
#include <malloc.h>
#include <new>

namespace {

// A block of class c holds 16 c + 8 bytes: the sizes that glibc's malloc has on 64-bit systems.
constexpr std::size_t CLASSES = 64;
constexpr std::size_t size_of(std::size_t c) { return 16 * c + 8; }
constexpr std::size_t class_of(std::size_t size) { return size <= 24 ? 1 : (size + 7) / 16; }

constexpr int CHAIN = 32; // blocks that are passed on together

struct Block {
  Block* next;
};

Block* pop(Block*& list) {
  Block* block = list;
  list = block->next;
  return block;
}

std::atomic<Block*> passed_on[CLASSES]; // only ever taken as a whole

struct Lists {
  Block* freed; // by this thread
  Block* last; // of those
  int count; // of those
  Block* taken; // of what was passed on

  void* take(std::atomic<Block*>& others) {
    if (freed) {
      count--;
      return pop(freed);
    }
    if (!taken && others.load(std::memory_order_relaxed)) {
      taken = others.exchange(nullptr, std::memory_order_acquire);
    }
    return taken ? pop(taken) : nullptr;
  }

  void give(Block* block, std::atomic<Block*>& others) {
    if (!freed) {
      last = block;
    }
    block->next = freed;
    freed = block;
    if (++count < CHAIN) {
      return;
    }
    last->next = others.load(std::memory_order_relaxed);
    while (!others.compare_exchange_weak(
        last->next, freed, std::memory_order_release, std::memory_order_relaxed)) {
    }
    freed = nullptr;
    count = 0;
  }

  void clear() {
    for (Block** list : {&freed, &taken}) {
      while (*list) {
        std::free(pop(*list));
      }
    }
  }
};

[[gnu::tls_model("initial-exec")]] thread_local Lists* lists; // of this thread, one a class
[[gnu::tls_model("initial-exec")]] thread_local bool over; // its lists are gone

struct Thread {
  ~Thread() {
    over = true;
    for (std::size_t c = 0; c < CLASSES; c++) {
      lists[c].clear();
    }
    std::free(lists);
    lists = nullptr;
  }
};

// Whether every block of malloc's, of whatever size it was asked for, is as large as its class.
bool fits() {
  for (std::size_t c = 1; c < CLASSES; c++) {
    void* block = std::malloc(size_of(c - 1) + 1);
    const std::size_t size = malloc_usable_size(block);
    std::free(block);
    if (size < size_of(c)) {
      return false;
    }
  }
  return true;
}

// Whether this thread has lists.
bool ready() {
  if (lists) {
    return true;
  }
  static const bool possible = fits();
  if (over || !possible) {
    return false;
  }
  lists = static_cast<Lists*>(std::calloc(CLASSES, sizeof(Lists)));
  if (!lists) {
    return false;
  }
  static thread_local Thread until_its_end;
  (void)&until_its_end;
  return true;
}

} // namespace

void* operator new(std::size_t size) {
  const std::size_t c = class_of(size);
  if (c < CLASSES && ready()) {
    if (void* block = lists[c].take(passed_on[c])) {
      return block;
    }
    size = size_of(c);
  }
  while (true) {
    if (void* block = std::malloc(size)) {
      return block;
    }
    std::new_handler handler = std::get_new_handler();
    if (!handler) {
      throw std::bad_alloc();
    }
    handler();
  }
}

void operator delete(void* block, std::size_t size) noexcept {
  const std::size_t c = class_of(size);
  if (block && c < CLASSES && ready()) {
    lists[c].give(static_cast<Block*>(block), passed_on[c]);
  } else {
    std::free(block);
  }
}

void operator delete(void* block) noexcept {
  // Rounded down, in case that another library has asked for it in its own way.
  operator delete(block, block ? size_of((malloc_usable_size(block) - 8) / 16) : 0);
}
