package control

import (
	"math"
	"testing"
)

func TestRange(t *testing.T) {
	for _, tc := range []struct {
		name, in string
		want     Range
		parsed   bool
		inside   bool // a device of 1 MiB
	}{
		{"bytes", "0:512", Range{0, 512}, true, true},
		{"units", "64KiB:960KiB", Range{65536, 983040}, true, true},
		{"last byte", "1048575:1", Range{1048575, 1}, true, true},
		{"empty", "4096:0", Range{4096, 0}, true, false},
		{"across the end", "1048575:2", Range{1048575, 2}, true, false},
		{"behind the end", "2MiB:1", Range{2 << 20, 1}, true, false},
		{"sum overflows", "4096:9223372036854775807", Range{4096, math.MaxInt64}, true, false},
		{"no length", "4096", Range{}, false, false},
		{"no offset", ":4096", Range{}, false, false},
		{"negative", "-1:4096", Range{}, false, false},
		{"three parts", "1:2:3", Range{}, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got Range
			err := got.UnmarshalText([]byte(tc.in))
			if (err == nil) != tc.parsed || tc.parsed && got != tc.want {
				t.Fatalf("range %q\n got %v, %v\nwant %v, parsed: %v", tc.in, got, err, tc.want, tc.parsed)
			}
			if !tc.parsed {
				return
			}
			if err := got.check(1 << 20); (err == nil) != tc.inside {
				t.Errorf("range %q in 1 MiB\n got %v\nwant inside: %v", tc.in, err, tc.inside)
			}
			var again Range
			if text, err := got.MarshalText(); err != nil || again.UnmarshalText(text) != nil || again != got {
				t.Errorf("range %q written and read again\n got %v\nwant %v", tc.in, again, got)
			}
		})
	}
}
