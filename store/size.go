// Sizes as people write them.

package store

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
)

var sizeUnits = []struct {
	suffix string
	shift  uint
}{{"PiB", 50}, {"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}}

// ParseSize reads a size in bytes: decimal digits, alone or followed by KiB,
// MiB, GiB, TiB or PiB.
func ParseSize(s string) (int64, error) {
	digits, shift := s, uint(0)
	for _, u := range sizeUnits {
		if d, ok := strings.CutSuffix(s, u.suffix); ok {
			digits, shift = d, u.shift
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && n > math.MaxInt64>>shift:
		return 0, fmt.Errorf("size %q is too large", s)
	case err != nil:
		return 0, fmt.Errorf("%q is not a size such as 512, 64KiB, 10GiB or 1TiB", s)
	}
	return int64(n << shift), nil
}

// FormatSize returns n bytes in the largest unit that gives a whole number, so
// that ParseSize reads back exactly n. It is for n of at least 0.
func FormatSize(n int64) string {
	for _, u := range sizeUnits {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.suffix
		}
	}
	return strconv.FormatInt(n, 10)
}
