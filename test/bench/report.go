// The table.

package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"
)

// unit is what a row's values are, and how they are printed.
type unit int

const (
	requestRate unit = iota // requests a second
	byteRate                // bytes a second
	byteCount
	nanos
	micros
	millis
	factor
)

func (u unit) String() string {
	return [...]string{"requests/s", "MiB/s", "MiB", "ns", "us", "ms", ""}[u]
}

// print formats a value in the unit, without its name.
func (u unit) print(v float64) string {
	switch u {
	case byteRate, byteCount:
		return format(v / miB)
	default:
		return format(v)
	}
}

// format prints three digits that count.
func format(v float64) string {
	if v == 0 || math.IsNaN(v) {
		return fmt.Sprint(v)
	}
	places := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	whole := fmt.Sprintf("%.*f", places, v)
	digits, fraction, _ := strings.Cut(whole, ".")
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	if fraction != "" {
		return digits + "." + fraction
	}
	return digits
}

// median returns NaN where there is no value.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func writeReport(w io.Writer, o options, results []result, took time.Duration) error {
	var s strings.Builder
	fmt.Fprintf(&s, "# Benchmarks\n\n%s\n", conditions(o, took))
	group := ""
	for i, r := range results {
		if r.group != group {
			fmt.Fprintf(&s, "\n## %s\n", r.group)
		}
		if r.group != group || !slices.Equal(names(r), names(results[i-1])) {
			writeHead(&s, r)
		}
		writeRow(&s, r)
		group = r.group
	}
	_, err := io.WriteString(w, s.String())
	return err
}

// conditions says what was measured, with what, where.
func conditions(o options, took time.Duration) string {
	return fmt.Sprintf(`Made by %smake bench%s on %s in %s: medians of %d, of two where a run takes minutes (the record for loss of power), in brackets the lowest and highest, and in the next columns
how many times the value of that subject the first one's is. Every subject of a row is measured in each run, one after the other or in turns. Origin:
%d MiB of random bytes in page cache, on %s; snapstore: a file beside it; unix sockets; fio's nbd engine.

%s, %d cores, %s memory; Linux %s.
%s; %s; %s; %s; %s.
`,
		"`", "`", time.Now().UTC().Format("2006-01-02"), took.Round(time.Minute), o.runs, o.size/miB,
		says("findmnt", "-n", "-o", "FSTYPE", "-T", o.dir), cpu(), runtime.NumCPU(), says("sh", "-c", "free -h | awk '/Mem/ {print $2}'"), says("uname", "-r"),
		says(o.blksnap, "version"), says("nbdkit", "--version"), says("qemu-nbd", "--version"), says("fio", "--version"), runtime.Version())
}

// says returns the first line that a command prints.
func says(name string, args ...string) string {
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		return name + ": " + err.Error()
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}

func cpu() string {
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err.Error()
	}
	_, rest, _ := strings.Cut(string(text), "model name\t: ")
	line, _, _ := strings.Cut(rest, "\n")
	return line
}

func names(r result) (n []string) {
	for _, s := range r.subjects {
		n = append(n, s.name)
	}
	return n
}

func writeHead(w io.Writer, r result) {
	fmt.Fprint(w, "\n| work | unit |")
	for _, n := range names(r) {
		fmt.Fprintf(w, " %s |", n)
	}
	for _, n := range names(r)[1:] {
		fmt.Fprintf(w, " / %s |", n)
	}
	fmt.Fprintf(w, " aim |\n|%s\n", strings.Repeat(" --- |", 2*len(r.subjects)+2))
}

func writeRow(w io.Writer, r result) {
	if r.err != nil {
		// As wide as the others, so that the table stays one.
		fmt.Fprintf(w, "| %s | %s |%s %s |\n", r.work, r.unit, strings.Repeat(" |", 2*len(r.subjects)-1), oneLine(r.err))
		return
	}
	fmt.Fprintf(w, "| %s | %s |", r.work, r.unit)
	for _, v := range r.values {
		fmt.Fprintf(w, " %s (%s to %s) |", r.unit.print(median(v)), r.unit.print(slices.Min(v)), r.unit.print(slices.Max(v)))
	}
	for _, v := range r.values[1:] {
		fmt.Fprintf(w, " %.2f |", median(r.values[0])/median(v))
	}
	fmt.Fprintf(w, " %s |\n", r.aim)
}

func oneLine(err error) string {
	return strings.ReplaceAll(strings.ReplaceAll(err.Error(), "\n", " "), "|", "/")
}
