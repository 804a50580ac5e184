/* The content of the libraries that only depend on libascendcl. Not empty, because debuggers and unwinders expect code.
 */
int cann_sim_thin(void);

int cann_sim_thin(void)
{
    return 0;
}
