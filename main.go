// blksnap takes snapshots of live block origins from user space and tracks which
// blocks changed between them. This file is its table of contents: the commands,
// and nothing else. The daemon and its client are package control.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"blksnap/control"
)

// version is set by the linker, see Makefile.
var version = "0.1.0"

// cli is the command line. README.md and blksnap(8) explain it.
type cli struct {
	Serve  serveCmd `cmd:"" help:"Run the daemon in the foreground."`
	Device struct {
		List   deviceListCmd   `cmd:"" help:"List the devices."`
		Show   deviceShowCmd   `cmd:"" help:"Show all about a device."`
		Add    deviceAddCmd    `cmd:"" help:"Put an origin under tracking."`
		Remove deviceRemoveCmd `cmd:"" help:"End a device's tracking; refused while it has snapshots or clients."`
		Resize deviceResizeCmd `cmd:"" help:"Make a device as long as its origin has become."`
	} `cmd:"" help:"Devices: origins under tracking."`
	Snapshot struct {
		Create   snapshotCreateCmd   `cmd:"" help:"Take a snapshot and print its name."`
		List     snapshotListCmd     `cmd:"" help:"List the snapshots, oldest first."`
		Show     snapshotShowCmd     `cmd:"" help:"Show all about a snapshot."`
		Destroy  snapshotDestroyCmd  `cmd:"" help:"Destroy snapshots; refused while an image is in use."`
		Rollback snapshotRollbackCmd `cmd:"" help:"Make devices what they were at a snapshot; refused while they have clients."`
	} `cmd:"" help:"Snapshots: the state of devices at one instant."`
	Cbt struct {
		Show    cbtShowCmd    `cmd:"" help:"Show a device's generation and number."`
		Extents cbtExtentsCmd `cmd:"" help:"Print what a copy has to read: OFFSET LENGTH KIND."`
		Mark    cbtMarkCmd    `cmd:"" help:"Make ranges count as changed."`
		Reset   cbtResetCmd   `cmd:"" help:"Begin a new generation: the next copy must be a full one."`
	} `cmd:"" help:"Changed-block tracking."`
	Store struct {
		List storeListCmd `cmd:"" help:"List the parts of the snapstore, in order of preference."`
		Add  storeAddCmd  `cmd:"" help:"Add a part to the snapstore, while snapshots are open."`
	} `cmd:"" help:"The snapstore."`
	State struct {
		Check stateCheckCmd `cmd:"" help:"Verify all that outlives the daemon, also while it runs; changes nothing."`
	} `cmd:"" help:"What is kept in the run and the state directory."`
	Events  eventsCmd  `cmd:"" help:"Print what happened."`
	Version versionCmd `cmd:"" help:"Print the version; with --control the daemon's, too."`
}

// remote are the flags of every command that asks a running daemon.
type remote struct {
	Control string `env:"BLKSNAP_CONTROL" placeholder:"PATH" help:"The daemon's control socket (/run/blksnapd/control.sock; unprivileged $XDG_RUNTIME_DIR/blksnapd/control.sock)."`
}

func (r remote) client() *control.Client { return control.NewClient(r.Control) }

// printed are the flags of every command that prints more than a name.
type printed struct {
	remote
	JSON bool `name:"json" help:"Print one JSON object a line."`
}

func (p printed) to(w io.Writer) control.Output { return control.Output{Writer: w, JSON: p.JSON} }

// show prints what a request was answered with.
func show[T any](v T, err error, print func(T) error) error {
	if err != nil {
		return err
	}
	return print(v)
}

type serveCmd struct{ control.Config }

func (c *serveCmd) Run(ctx context.Context) error {
	ctx, stop := untilSignal(ctx)
	defer stop()
	return control.Serve(ctx, c.Config, version, os.Stdout, os.Stderr)
}

type deviceListCmd struct{ printed }

func (c *deviceListCmd) Run(ctx context.Context, w io.Writer) error {
	l, err := c.client().Devices(ctx)
	return show(l, err, c.to(w).Devices)
}

type deviceShowCmd struct {
	printed
	Name string `arg:"" help:"The device."`
}

func (c *deviceShowCmd) Run(ctx context.Context, w io.Writer) error {
	v, err := c.client().Device(ctx, c.Name)
	return show(v, err, c.to(w).Device)
}

type deviceAddCmd struct {
	remote
	Origin string `arg:"" placeholder:"[NAME=]ORIGIN" help:"Raw image file or block device, under its name (default: its base name without extension)."`
	control.DeviceConfig
}

func (c *deviceAddCmd) Run(ctx context.Context, w io.Writer) error {
	v, err := c.client().AddDevice(ctx, c.Origin, c.DeviceConfig)
	return show(v, err, control.Output{Writer: w}.Added)
}

type deviceRemoveCmd struct {
	remote
	Name string `arg:"" help:"The device."`
}

func (c *deviceRemoveCmd) Run(ctx context.Context) error {
	return c.client().RemoveDevice(ctx, c.Name)
}

type deviceResizeCmd struct {
	remote
	Name   string        `arg:"" help:"The device."`
	Shrink *control.Size `placeholder:"SIZE" help:"Cut the origin, a file, to SIZE before, after what snapshots need of the rest was preserved."`
}

func (c *deviceResizeCmd) Validate() error { return positive("--shrink", c.Shrink) }

func (c *deviceResizeCmd) Run(ctx context.Context, w io.Writer) error {
	v, err := c.client().ResizeDevice(ctx, c.Name, int64(orZero(c.Shrink)))
	return show(v, err, control.Output{Writer: w}.Added)
}

type snapshotCreateCmd struct {
	remote
	Name   *string  `arg:"" optional:"" help:"Its name (default: its time in UTC)."`
	Named  *string  `name:"name" placeholder:"NAME" help:"The same as the argument."`
	Device []string `placeholder:"DEVICE" sep:"none" help:"Of this device alone; repeatable (default: of all of them, at one instant)."`

	Writable bool          `help:"Make images that can be written to; what is written belongs to the image alone."`
	MaxStore *control.Size `placeholder:"SIZE" help:"How much of the snapstore it may need; when it needs more it alone is lost (all of it)."`

	Freeze []string       `placeholder:"MOUNTPOINT" sep:"none" help:"Freeze this file system around the instant; repeatable."`
	Before string         `placeholder:"CMD" help:"Run CMD with sh before; if it fails no snapshot is taken."`
	After  string         `placeholder:"CMD" help:"Run CMD with sh after, whatever happened."`
	TTL    *time.Duration `name:"ttl" placeholder:"DURATION" help:"Destroy the snapshot after this time, also if it is in use (never)."`
}

// Validate refuses two names, an empty one (a script's variable was not set), an empty
// mount point, which would be the directory that we are in, and limits that are none.
func (c *snapshotCreateCmd) Validate() error {
	switch {
	case c.Name != nil && c.Named != nil:
		return errors.New("NAME and --name are both given")
	case c.Named != nil:
		c.Name = c.Named
	}
	if c.Name != nil && *c.Name == "" {
		return errors.New("NAME is empty")
	}
	if slices.Contains(c.Freeze, "") {
		return errors.New("MOUNTPOINT of --freeze is empty")
	}
	return errors.Join(positive("--ttl", c.TTL), positive("--max-store", c.MaxStore))
}

// positive refuses 0 and less for a flag that was given: a script has computed it, and
// it would stand for no limit.
func positive[T ~int64](flag string, v *T) error {
	if v != nil && *v <= 0 {
		return fmt.Errorf("%s must be more than 0", flag)
	}
	return nil
}

func orZero[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

func (c *snapshotCreateCmd) Run(ctx context.Context, w io.Writer) error {
	var name string
	if c.Name != nil {
		name = *c.Name
	}
	v, err := c.client().Take(ctx, control.Taking{
		SnapshotRequest: control.SnapshotRequest{Name: name, Devices: c.Device, TTL: orZero(c.TTL), Writable: c.Writable, MaxStore: int64(orZero(c.MaxStore))},
		Freeze:          c.Freeze, Before: c.Before, After: c.After,
	})
	if v.Name != "" { // there is a snapshot, also where only --after failed
		err = errors.Join(control.Output{Writer: w}.Taken(v), err)
	}
	return err
}

type snapshotListCmd struct{ printed }

func (c *snapshotListCmd) Run(ctx context.Context, w io.Writer) error {
	l, err := c.client().Snapshots(ctx)
	return show(l, err, c.to(w).Snapshots)
}

type snapshotShowCmd struct {
	printed
	Name string `arg:"" help:"The snapshot."`
}

func (c *snapshotShowCmd) Run(ctx context.Context, w io.Writer) error {
	v, err := c.client().Snapshot(ctx, c.Name)
	return show(v, err, c.to(w).Snapshot)
}

type snapshotDestroyCmd struct {
	remote
	Name  []string `arg:"" help:"The snapshots."`
	Force bool     `help:"Also while images are in use: open files get EIO, clients ESHUTDOWN."`
}

func (c *snapshotDestroyCmd) Run(ctx context.Context) error {
	return c.client().DestroySnapshots(ctx, c.Name, c.Force)
}

type snapshotRollbackCmd struct {
	remote
	Name   string   `arg:"" help:"The snapshot."`
	Device []string `placeholder:"DEVICE" sep:"none" help:"This device alone; repeatable (default: all of the snapshot's)."`
	Force  bool     `help:"Disconnect NBD clients of the devices."`
}

func (c *snapshotRollbackCmd) Run(ctx context.Context, w io.Writer) error {
	v, err := c.client().RollBack(ctx, c.Name, c.Device, c.Force)
	return show(v, err, func(v control.RollbackInfo) error { return control.Output{Writer: w}.RolledBack(v, c.Name) })
}

type cbtShowCmd struct {
	printed
	Device string `arg:"" help:"The device."`
}

func (c *cbtShowCmd) Run(ctx context.Context, w io.Writer) error {
	v, err := c.client().Changes(ctx, c.Device)
	return show(v, err, c.to(w).Changes)
}

type cbtExtentsCmd struct {
	printed
	Device     string        `arg:"" help:"The device."`
	Since      control.Since `required:"" placeholder:"NUM|all" help:"Number of the last snapshot that was copied; all: everything that is allocated."`
	At         string        `placeholder:"SNAPSHOT" help:"Of its image (default: of the live device)."`
	Generation string        `placeholder:"UUID" help:"Only if the changes are of this generation; else status 3, a full read is due."`
}

func (c *cbtExtentsCmd) Run(ctx context.Context, w io.Writer) error {
	q := control.ExtentsQuery{Since: c.Since, At: c.At, Generation: c.Generation}
	return c.to(w).Extents(c.client().Extents(ctx, c.Device, q))
}

type cbtMarkCmd struct {
	remote
	Device string          `arg:"" help:"The device."`
	Range  []control.Range `required:"" placeholder:"OFF:LEN" sep:"none" help:"Bytes that count as changed; repeatable."`
}

func (c *cbtMarkCmd) Run(ctx context.Context) error {
	return c.client().Mark(ctx, c.Device, c.Range)
}

type cbtResetCmd struct {
	remote
	Device string `arg:"" help:"The device."`
}

func (c *cbtResetCmd) Run(ctx context.Context) error {
	return c.client().ResetChanges(ctx, c.Device)
}

type storeListCmd struct{ printed }

func (c *storeListCmd) Run(ctx context.Context, w io.Writer) error {
	l, err := c.client().Store(ctx)
	return show(l, err, c.to(w).Store)
}

type storeAddCmd struct {
	remote
	Spec  string `arg:"" placeholder:"SPEC" help:"mem[:LIMIT], file:PATH[:LIMIT] or dev:PATH."`
	Force bool   `help:"Take a file or device although it holds something else."`
}

func (c *storeAddCmd) Run(ctx context.Context) error {
	return c.client().AddPart(ctx, c.Spec, c.Force)
}

type stateCheckCmd struct {
	printed
	RunDir   string `name:"run" placeholder:"DIR" help:"The daemon's run directory, if it does not run (/run/blksnapd; unprivileged $XDG_RUNTIME_DIR/blksnapd)."`
	StateDir string `name:"state" placeholder:"DIR" help:"Its state directory (/var/lib/blksnap; unprivileged $XDG_STATE_HOME/blksnap)."`
	File     string `placeholder:"FILE" name:"config" help:"Its configuration (/etc/blksnap.yaml where it exists)."`
}

func (c *stateCheckCmd) Run(ctx context.Context, w io.Writer) error {
	l, err := control.Inspect(ctx, control.Inspecting{Control: c.Control, Run: c.RunDir, State: c.StateDir, File: c.File})
	return show(l, err, c.to(w).Inspected)
}

type eventsCmd struct {
	printed
	Follow bool `help:"Go on with new ones as they come."`
}

func (c *eventsCmd) Run(ctx context.Context, w io.Writer) error {
	return c.to(w).Events(c.client().Events(ctx, c.Follow))
}

type versionCmd struct{ remote }

func (c *versionCmd) Run(ctx context.Context, w io.Writer) error {
	fmt.Fprintln(w, "blksnap", version)
	if c.Control == "" {
		return nil
	}
	v, err := c.client().Version(ctx)
	return show(v, err, control.Output{Writer: w}.Version)
}

// untilSignal returns a context that ends with the first signal to stop. A
// second one has its usual effect: whoever sends it will not wait.
func untilSignal(ctx context.Context) (context.Context, context.CancelFunc) {
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(ctx, signals...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// newParser returns the parser of c. It prints help to w.
func newParser(c *cli, w io.Writer) (*kong.Kong, error) {
	return kong.New(c,
		kong.Name("blksnap"),
		kong.Description("Snapshots of live disks and what changed between them, from user space. See blksnap(8)."),
		kong.Writers(w, os.Stderr),
		kong.BindTo(context.Background(), (*context.Context)(nil)),
		kong.BindTo(w, (*io.Writer)(nil)),
	)
}

// run carries out a command line and returns the exit status.
func run(args []string) (status int, err error) {
	if control.IsMount(args) { // mount.fuse3 runs us so, for a line in fstab
		ctx, stop := untilSignal(context.Background())
		defer stop()
		err := control.Mount(ctx, args)
		return control.ExitStatus(err), err
	}
	var c cli
	parser, err := newParser(&c, os.Stdout)
	if err != nil {
		return 2, err
	}
	command, err := parser.Parse(args)
	if err != nil {
		return 2, err
	}
	err = command.Run()
	return control.ExitStatus(err), err
}

// init keeps the first thread to main, which makes no call that a disk can hold up: the kernel
// gives a signal to that thread first, and there it would wait for the disk as well.
func init() { runtime.LockOSThread() }

func main() {
	if status, ok := control.Helper(os.Args, os.Stdin, os.Stdout); ok { // snapshot create runs us so
		os.Exit(status)
	}
	status, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "blksnap:", control.OneLine(err))
	}
	os.Exit(status)
}
