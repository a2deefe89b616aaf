// Sizes, times and counts in words for people.

package control

import (
	"cmp"
	"fmt"
	"strconv"
	"time"

	"blksnap/store"
)

// people is a size as people read it: whole, or with one digit.
func people(n int64) string {
	exact := store.FormatSize(n)
	if len(exact) <= len("1023KiB") {
		return exact
	}
	return rounded(n)
}

// rounded is a size with a unit and one digit.
func rounded(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, u := float64(n), 0
	for ; f >= 1023.95 && u < len(units)-1; u++ {
		f /= 1024
	}
	return fmt.Sprintf("%.1f%s", f, units[u])
}

// rate is how many bytes there are in a second, never without a unit: nothing else
// says that it counts bytes.
func rate(n int64) string {
	switch {
	case n < 1024:
		return plural(int(n), "byte") + " a second"
	case n%1024 == 0:
		return people(n) + " a second"
	}
	return rounded(n) + " a second"
}

// sizeLine is a size in bytes, and as people read it where that differs.
func sizeLine(n int64) string {
	exact := strconv.FormatInt(n, 10)
	if p := people(n); p != exact {
		return exact + " (" + p + ")"
	}
	return exact
}

func clock(t time.Time) string { return t.Local().Format(time.DateTime) }

// span is a time that is left, as exactly as people want it.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= 365*day:
		return "over a year"
	case d >= 2*day:
		return plural(int(d/day), "day")
	}
	return d.Round(time.Second).String()
}

func orDash(s string) string { return cmp.Or(s, "-") }

// plural is n with the word for it.
func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprintf("%d %ss", n, word)
}

// clip shortens what a user gave to what fits into one line of an error.
func clip(s string) string {
	if len(s) > 2*maxName {
		return s[:2*maxName] + "..."
	}
	return s
}
