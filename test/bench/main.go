// Bench measures blksnap side by side with nbdkit's file plugin, qemu-nbd and
// qemu-storage-daemon with copy-before-write, and its change tracking, and prints a
// table in Markdown. `make bench` runs it; it needs root, and a quiet machine.
//
// In every run each subject of a row is measured once, one after the other or in
// turns, so that what disturbs the machine disturbs all of them; the table has medians,
// and the ratios of those.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// options are the command line's.
type options struct {
	blksnap string        // path of the binary
	rows    string        // regular expression over the names of rows
	runs    int           // how often each row is measured
	size    int64         // of the origin, in bytes
	load    time.Duration // how long a load without an end of its own lasts
	budget  time.Duration // no run begins after it
	dir     string        // where the origin and the snapstore are made
	sparse  string        // where origins of many TiB fit: tmpfs or xfs
	rundir  string        // where blksnap's run directory is made
	out     string        // the table's file; empty: standard output
	list    bool
}

func main() {
	var o options
	var mib int64
	flag.StringVar(&o.blksnap, "blksnap", "./blksnap", "the binary to measure")
	flag.StringVar(&o.rows, "rows", ".", "measure the rows whose name matches this regular expression")
	flag.IntVar(&o.runs, "runs", 5, "how often each row is measured")
	flag.Int64Var(&mib, "size", 2048, "size of the origin in MiB")
	flag.DurationVar(&o.load, "load", 3*time.Second, "how long loads without an end last")
	flag.DurationVar(&o.budget, "budget", time.Hour, "begin no measurement after this")
	flag.StringVar(&o.dir, "dir", "/var/tmp", "where the origin and the snapstore are made")
	flag.StringVar(&o.sparse, "sparse", "/dev/shm", "where origins of many TiB are made, on tmpfs or xfs")
	flag.StringVar(&o.rundir, "rundir", "/dev/shm", "where blksnap's run directory is made, on tmpfs as /run is")
	flag.StringVar(&o.out, "o", "", "write the table to this file")
	flag.BoolVar(&o.list, "list", false, "list the rows")
	flag.Parse()
	o.size = mib << 20

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	selected, err := selectRows(o.rows)
	if err != nil {
		return err
	}
	if o.list {
		for _, r := range selected {
			fmt.Printf("%-12s %s\n", r.name, r.work)
		}
		return nil
	}

	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer b.clear()
	begun := time.Now()
	results := b.measureAll(selected, begun.Add(o.budget))
	if err := ctx.Err(); err != nil {
		return err
	}

	var w io.Writer = os.Stdout
	if o.out != "" {
		f, err := os.Create(o.out)
		if err != nil {
			return err
		}
		defer f.Close()
		w = f
	}
	return writeReport(w, o, results, time.Since(begun))
}

func selectRows(pattern string) (selected []row, err error) {
	re, err := regexp.Compile(pattern)
	if err != nil {
		return nil, fmt.Errorf("rows: %w", err)
	}
	for _, r := range rows {
		if re.MatchString(r.name) {
			selected = append(selected, r)
		}
	}
	if len(selected) == 0 {
		return nil, fmt.Errorf("no row matches %q", pattern)
	}
	return selected, nil
}

// bench is what the rows share.
type bench struct {
	options
	ctx    context.Context
	work   string // a directory that is removed at the end
	origin string // a file of size random bytes
}

func newBench(ctx context.Context, o options) (*bench, error) {
	var err error
	if o.blksnap, err = filepath.Abs(o.blksnap); err != nil {
		return nil, err
	}
	b := &bench{options: o, ctx: ctx}
	if b.work, err = os.MkdirTemp(o.dir, "blksnap-bench-"); err != nil {
		return nil, err
	}
	b.origin = filepath.Join(b.work, "origin")
	if err := makeRandom(b.origin, o.size); err != nil {
		b.clear()
		return nil, err
	}
	return b, nil
}

func (b *bench) clear() {
	if err := os.RemoveAll(b.work); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

// result is what was measured of a row.
type result struct {
	row
	values [][]float64 // by subject, by run
	err    error       // why there are fewer values than there should be
}

// measureAll measures rows in turn. A row that fails does not stop the others.
func (b *bench) measureAll(rows []row, deadline time.Time) []result {
	var results []result
	for _, r := range rows {
		res := result{row: r, values: make([][]float64, len(r.subjects))}
		runs := b.runs
		if slow[r.name] {
			runs = min(runs, 2)
		}
		for n := range runs {
			if res.err = b.measureOnce(&res, deadline); res.err != nil {
				break
			}
			fmt.Fprintf(os.Stderr, "%s, run %d of %d:%s\n", r.name, n+1, runs, res.lastRun())
		}
		if res.err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", r.name, res.err)
		}
		results = append(results, res)
		if b.ctx.Err() != nil {
			break
		}
	}
	return results
}

func (b *bench) measureOnce(res *result, deadline time.Time) error {
	if time.Now().After(deadline) {
		return fmt.Errorf("not measured: the time for all of it was over")
	}
	for i, s := range res.subjects {
		v, err := s.measure(b)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		res.values[i] = append(res.values[i], v)
	}
	return nil
}

func (r *result) lastRun() string {
	var s strings.Builder
	for i, subject := range r.subjects {
		v := r.values[i]
		fmt.Fprintf(&s, "  %s %s", subject.name, format(v[len(v)-1]))
	}
	return s.String()
}
