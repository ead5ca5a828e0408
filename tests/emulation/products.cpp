#include "products.h"

#include "fault.h"
#include "machine.h"

namespace emulation {

void SumsInUse::read(const std::source_location& where) const {
  if (products > 0) {
    fault(FaultKind::in_flight, where, "the sums of a wgmma before the wait that covers it");
  }
}

void SumsInUse::touch(const std::source_location& where) {
  read(where);
  touched = Machine::instance().thread().products.fences();
}

void AsyncProducts::start(SumsInUse& sums, const Moment& moment,
                          const std::source_location& where) {
  if (sums.touched < 0) fault(FaultKind::uninitialised, where, "sums that were never set");
  if (sums.products == 0 && sums.touched >= fences_) {
    fault(FaultKind::race, where, "wgmma on sums that were written with no wgmma.fence since");
  }
  ++sums.products;
  under_way_.push_back({&sums, moment, groups_});
}

void AsyncProducts::wait(int pending) {
  std::size_t over = 0;
  while (over < under_way_.size() && under_way_[over].group < groups_ - pending) {
    const Product& product = under_way_[over++];
    --product.sums->products;
    Machine::instance().learn(product.moment);
  }
  under_way_.erase(under_way_.begin(), under_way_.begin() + static_cast<std::ptrdiff_t>(over));
}

}  // namespace emulation
